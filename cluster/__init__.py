"""Past one machine: prediction over millions of photos, and a service. docs/scale.md says how, and what it costs."""
