"""Limits on what is read from files that others wrote, all in one place.

They bound memory and time before anything is believed that such a file says about
itself. Whoever really has more finds the number here.
"""

# JSON: a manifest, an index, a line of an import.
MAX_JSON_BYTES = 64 * 2**20  # of a document or a line
MAX_JSON_CONTAINERS = 2**21  # objects and lists of a document: some 500 MB of them
MAX_TEXT = 2**20  # characters of a name or a description in a manifest

# Teacher caches.
MAX_SHARDS = 100_000  # of a cache
MAX_SHARD_RECORDS = 2**22  # of one file
MAX_ENTRY_BYTES = 256 * 2**20  # one record, footer or index of a file, as stored
MAX_PAIRS = 2**24  # pairs or draws of a record: 1 GiB while it is decoded
MAX_DENSE = 2**26  # log-probabilities of a dense record: the same
MAX_TEMPERATURES = 64  # of a cache
MAX_ROUNDS = 2**16 - 1  # of draws

# Imports.
MAX_SEQUENCE_PAIRS = 2**23  # log-probabilities of one sequence, as its tool stored them
MAX_EXAMPLE_BYTES = 64 * 2**20  # of a tf.Example
MAX_EXAMPLE_FIELDS = 2**19  # of a tf.Example, those of all its messages
MAX_SETTINGS_BYTES = 2**16  # of a compression_config.yaml
MAX_PARQUET_RATIO = 1000  # bytes of a column over those that are stored of it
