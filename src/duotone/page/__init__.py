"""The report of a checkpoint: facts gathered once (`facts`, `census`, `measured`), then written as html, md, png or json."""
