"""Live panels over a run: ``page``, ``panel`` and ``*_panel`` import anywidget, the other files make what they show."""
