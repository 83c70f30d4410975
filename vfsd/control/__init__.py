"""The control socket: what an operator asks of a running daemon, by JSON-RPC 2.0, a line for each message."""
