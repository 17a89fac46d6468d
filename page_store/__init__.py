"""A node's page store: takes what its workers seal, and keeps it when they need the room or end."""
