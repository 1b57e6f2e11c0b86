"""Live widgets over a run. ``page``, ``parts`` and the tabs import ipywidgets, the other files what they show."""
