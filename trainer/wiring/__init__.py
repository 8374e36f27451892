"""Who and where this process is: node, rank, network, devices."""
