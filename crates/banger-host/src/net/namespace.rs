//! What `banger-netns` does inside the namespace.
