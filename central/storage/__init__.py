"""Storage over time: a journal and its blobs enter; backups, restored centrals and collected blobs leave."""
