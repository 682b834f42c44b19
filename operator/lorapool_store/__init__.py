"""The store of the release's files: data sets, checkpoints and trained adapters, on a volume or in a bucket.

One process serves the protocol of `lorapool_api.store_protocol`, so that no other part needs the bucket's credentials
or knows which kind of storage it is. What the files mean is not known here.
"""
