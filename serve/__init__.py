"""From a run to something a colleague can use: exports, predictions, an endpoint, a demo, downloads."""
