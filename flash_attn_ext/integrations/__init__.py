"""Other packages' ways to plug attention in; each module imports its package only when it is used itself."""
