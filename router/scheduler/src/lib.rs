//! Decides what every step computes; pure.
