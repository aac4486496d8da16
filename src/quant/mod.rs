//! Ternary and int8 codes, and their packing.
