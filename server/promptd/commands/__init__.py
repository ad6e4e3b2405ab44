"""The commands of `promptd`. Each module imports what it needs when it runs, so that help is there at once."""
