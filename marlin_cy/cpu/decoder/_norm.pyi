# Only C functions, for the other extensions of this package.
