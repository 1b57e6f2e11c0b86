"""What one class learns over a frozen network: the functions of Eq. 8-19, the methods made of them, and those compared.

To add a function or a method, register it: ``@function(...)`` or ``register(Method(...))``, here or in a user's file.
"""

from funlora_lab.adapters import compared  # registers the methods that the paper compares with
from funlora_lab.adapters.adapted import LABEL, Adapters, numbers_by_layer, stack, unstack
from funlora_lab.adapters.functional import function
from funlora_lab.adapters.method import BUILT_IN, METHODS, Method, Row, Settings, register, source_text, window

BUILT_IN.update(METHODS)
