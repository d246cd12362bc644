"""The same apps and requests on plain uvicorn and through daskserve."""
