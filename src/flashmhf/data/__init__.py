"""From a SOURCE of text to blocks of tokens: documents, tokens, fixed blocks with separators between documents.

A SOURCE is `stdlib` (the Python standard library of this machine), a file or folder of .txt, .jsonl or .parquet
(compressed too), or the id of a dataset on the Hub, `owner/name` or `owner/name:subset`.
Training also takes several by weight, `0.7*SOURCE,0.3*SOURCE`.
"""
