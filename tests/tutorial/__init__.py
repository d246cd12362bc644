"""Small FastAPI apps as users write them, each a script with all of it global.

``REQUESTS`` is what `tests.test_tutorial` asks: method, path, and options of httpx; for
``"WS"`` what to send, and how much to receive where the app does not close. What an app
remembers is in ``state``, if it has that.
"""
