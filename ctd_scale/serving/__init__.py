"""The served endpoint: Ray Serve deployments behind FastAPI."""
