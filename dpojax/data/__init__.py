"""From files to token ids: records, report, sources, tokenise (imports flow in this order)."""
