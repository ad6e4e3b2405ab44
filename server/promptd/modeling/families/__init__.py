"""One small module per model family: what it accepts, and its sizes."""
