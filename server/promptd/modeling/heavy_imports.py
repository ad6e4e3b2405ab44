"""Imports torch and the heavy half of transformers, which takes most of a start, without garbage collections.

They make a million objects that stay; each collection on the way walks them all and finds nothing, which is a fifth of
the time. Nor do later collections walk them: the rest of a start has several. The commands that load a model import
this before anything else that imports either.
"""

import atexit
import gc

_collects = gc.isenabled()
gc.disable()
try:
    import torch  # noqa: F401
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
finally:
    if _collects:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # libraries look at the end for what nobody has freed
