"""Generate video from timed prompts, segment by segment."""
