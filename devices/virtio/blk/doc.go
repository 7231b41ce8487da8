package blk
