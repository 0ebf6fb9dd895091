"""Text towers: tokens of texts, and of the labels that they have, as unit rows.

`bag.py` and `transformer.py` are built from the configuration over hashed words;
`from_open_clip.py` is the text side of an open_clip model, `from_hf.py` a Hugging Face encoder in a
local folder: each a module (n, T) tokens -> (n, d). `model.py` holds one or two of them with the
loss's scale and bias, `build.py` makes it, `weights.py` reads start weights, `label_texts.py` has
the labels' own texts.
"""

from trainer.models.texts.model import TextEmbeddings, TextModel

__all__ = ["TextEmbeddings", "TextModel"]
