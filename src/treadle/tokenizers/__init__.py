"""Train, load and encode; chat templates."""
