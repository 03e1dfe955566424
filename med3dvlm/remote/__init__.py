"""Files at an address (s3://, gs://, https:// or another that fsspec knows), fetched by need into a bounded folder of this machine."""
