"""The control plane's contract and its glue. PROTOCOL.md is the contract's text; weights never travel here."""
