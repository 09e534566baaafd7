"""From a SOURCE of text to blocks of tokens: documents, token ids, blocks of a fixed length.

An EOS token ends each document.

A SOURCE is `stdlib` (the Python standard library of this machine), a file or folder of .txt, .jsonl or .parquet
(compressed too), or the id of a dataset on the Hub, `owner/name` or `owner/name:subset`.
Training also takes several SOURCEs by weight, `0.7*SOURCE,0.3*SOURCE`.
"""
