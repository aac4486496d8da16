//! Token files, datasets and tokenisation.
