"""The contract: .proto files, their generated modules, and the error tree that crosses the wire."""
