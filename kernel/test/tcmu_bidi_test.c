// SPDX-License-Identifier: GPL-2.0-only
/*
 * For tests alone: makes XDWRITEREAD(10) bidirectional on its way through
 * tcm_loop.
 *
 * No fabric in the tree hands a bidirectional command to the target core any
 * more: the SCSI midlayer has dropped them. This one adds a Data-In list to
 * each XDWRITEREAD that tcm_loop submits, as long as its Data-Out list. The
 * pages are the module's, filled with 0xa5 before each command; debugfs
 * tcmu_bidi_test/data_in shows what a handler has left in them. One such
 * command at a time. Only x86-64, as it changes arguments in registers.
 */
#include <linux/debugfs.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/vmalloc.h>
#include <scsi/scsi_proto.h>
#include <target/target_core_base.h>

#define MAX_PAGES 256

static struct scatterlist sgl[MAX_PAGES];
static void *data_in;
static struct debugfs_blob_wrapper blob;
static struct dentry *dir;

static int submit_prep(struct kprobe *probe, struct pt_regs *regs)
{
	struct se_cmd *se_cmd = (struct se_cmd *)regs->di;
	const u8 *cdb = (const u8 *)regs->si;
	u32 pages = DIV_ROUND_UP(se_cmd->data_length, PAGE_SIZE);
	u32 i, left = se_cmd->data_length;

	if (cdb[0] != XDWRITEREAD_10 || !pages || pages > MAX_PAGES)
		return 0;

	memset(data_in, 0xa5, MAX_PAGES * PAGE_SIZE);
	sg_init_table(sgl, pages);
	for (i = 0; i < pages; i++, left -= PAGE_SIZE)
		sg_set_page(&sgl[i], vmalloc_to_page(data_in + i * PAGE_SIZE),
			    min_t(u32, left, PAGE_SIZE), 0);
	blob.size = se_cmd->data_length;

	se_cmd->se_cmd_flags |= SCF_BIDI;
	regs->r8 = (unsigned long)sgl;
	regs->r9 = pages;
	return 0;
}

static struct kprobe probe = {
	.symbol_name = "target_submit_prep",
	.pre_handler = submit_prep,
};

static int __init bidi_test_init(void)
{
	int ret;

	data_in = vmalloc(MAX_PAGES * PAGE_SIZE);
	if (!data_in)
		return -ENOMEM;
	blob.data = data_in;
	dir = debugfs_create_dir("tcmu_bidi_test", NULL);
	debugfs_create_blob("data_in", 0400, dir, &blob);
	ret = register_kprobe(&probe);
	if (ret) {
		debugfs_remove(dir);
		vfree(data_in);
	}
	return ret;
}

static void __exit bidi_test_exit(void)
{
	unregister_kprobe(&probe);
	debugfs_remove(dir);
	vfree(data_in);
}

module_init(bidi_test_init);
module_exit(bidi_test_exit);
MODULE_DESCRIPTION("Bidirectional commands over tcm_loop, for tests of TCMU");
MODULE_LICENSE("GPL");
