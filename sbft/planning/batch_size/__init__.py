"""The smallest batch at full throughput."""
