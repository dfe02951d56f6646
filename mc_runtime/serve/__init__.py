"""`mc serve`: an OpenAI-compatible server over persistent memories, one model for all. Needs the extra `serve`."""
