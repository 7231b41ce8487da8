// Package config is what a user may say about a guest: the file, the environment and the
// flags of "ftvmm run", merged, checked and explained.
//
// One table ([Keys]) names every setting once; the file's keys, the FTVMM_* variables, the
// command's flags and "config show" all follow from it. A value comes from the highest of: flag,
// environment, file, default, and [Origins] remembers which. Settings that are lists (disk,
// nic, serial) are replaced as a whole, not merged.
//
// Strictness is a feature: an unknown key is an error that names the nearest key there is, and
// [Guest.Check] finds out before anything starts what would fail afterwards. Every refusal
// is an [Error] with a stable code for programs, a sentence for people and a remedy.
//
// The package says nothing about how a machine is built from a Guest; it opens no
// image and imports no device.
package config
