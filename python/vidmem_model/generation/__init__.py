"""Video from timed prompts, segment by segment."""
