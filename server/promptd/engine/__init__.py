"""The engine: many prompts, one packed batch. Knows no tenant, no HTTP framework and no model family."""
