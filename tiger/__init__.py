"""TIGER on Ray: generative retrieval with semantic IDs.

The glossary, in the order in which the data flows:

item            one entry of the catalog; `item_id` is its dense integer, `source_id` its original id in the raw data.
text            the text encoder's input for an item: its fields (title, brand, categories, ...) in one string.
embedding       the vector of a text.
code            one integer assigned by one level of the quantizer, in [0, codebook size).
semantic ID     the tuple of an item's codes, plus a collision code if needed, unique to the item.
token           one code of a semantic ID as the input of the generative model: a code together with its level.
history         one user's items in time order.
target          the item that the model is to generate from the history before it.
trie            all semantic IDs as a tree of prefixes; beam search walks it, so it can only end on real items.
artifact        the output folder of a finished stage, named kind-fingerprint, with a manifest.
"""

__version__ = "0.1.0"
