"""`muster compare`: single, dp and ddp on one job."""
