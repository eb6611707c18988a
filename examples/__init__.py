"""What does a user write? Three deployments, each a screen of code."""
