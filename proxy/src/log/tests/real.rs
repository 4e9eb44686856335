//! A real folder and swtpm.
