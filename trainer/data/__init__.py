"""From recorded rows to packed batches, as data passes: filters, advantages, packing, batch."""
