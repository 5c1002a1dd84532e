"""An HTTP server with OpenAI's API on the serving engine (extra `serve`)."""
