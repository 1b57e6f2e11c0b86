"""Live widgets over a run: ``page``, ``panel`` and ``*_panel`` import ipywidgets, the other files what they show."""
