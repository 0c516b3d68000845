"""The mesh, the sharding table and multi-process runs."""
