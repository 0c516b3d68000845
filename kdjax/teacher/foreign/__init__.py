"""Teacher outputs of other tools: their files, schemas and encodings."""
