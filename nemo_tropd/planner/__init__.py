"""What a run needs, worked out before it starts: bytes a GPU, bytes on the wire, roles of ranks. Imports no torch."""
