"""TIGER on Ray: generative retrieval with semantic IDs.

The glossary, in the order in which the data flows:

item            one entry of the catalog; `item_id` is its dense integer, `source_id` its name in the raw data.
text            what the text encoder reads of an item: its fields (title, brand, categories, ...) in one string.
embedding       the vector that the text encoder gives a text.
code            one integer chosen by one level of the quantizer, in [0, codebook size).
semantic ID     the tuple of an item's codes plus one collision code, unique to the item.
token           one code of a semantic ID as the generative model sees it: a code together with its level.
history         one user's items in time order.
target          the item that the model is to generate from the history before it.
trie            all semantic IDs as a tree of prefixes; beam search walks it, so it can only end on real items.
artifact        the folder that a finished stage leaves behind, named stage-fingerprint, with a manifest.
"""

__version__ = "0.1.0"
