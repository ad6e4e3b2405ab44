"""The store of many machines: records, leases, logs and small blobs in one Redis, large blobs beside it."""
