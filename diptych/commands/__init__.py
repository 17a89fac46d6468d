"""The commands, by what they are about. Each module imports what is slow only inside its commands."""
