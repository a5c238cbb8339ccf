//! Bindings to the QEMU tree that is being built, and the C beside them.
//!
//! QEMU's build sets these variables (`meson-integration/cargo-build`):
//!
//! - `RQCOW2_QEMU_SRC` and `RQCOW2_QEMU_BUILD`, the source and build trees;
//! - `RQCOW2_QEMU_CFLAGS`, what a preprocessor needs to read `block/*.c`;
//! - `RQCOW2_QEMU_CC` and `RQCOW2_QEMU_CC_FLAGS`, optional: the compiler and
//!   all that QEMU's own objects are compiled with.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Functions of QEMU that the crate calls; a trailing `.*` is a pattern.
const FUNCTIONS: &[&str] = &[
    "rq_.*",
    // The block layer.
    "bdrv_co_change_backing_file",
    "bdrv_co_copy_range_from",
    "bdrv_co_copy_range_to",
    "bdrv_co_create_file",
    "bdrv_co_debug_event",
    "bdrv_co_delete_file_noerr",
    "bdrv_co_flush",
    "bdrv_co_get_allocated_file_size",
    "bdrv_co_getlength",
    "bdrv_co_common_block_status_above",
    "bdrv_co_is_inserted",
    "bdrv_child_refresh_perms",
    "bdrv_co_open",
    "bdrv_co_open_child",
    "bdrv_co_open_blockdev_ref",
    "bdrv_co_pdiscard",
    "bdrv_co_preadv_part",
    "bdrv_co_pwrite_zeroes",
    "bdrv_co_pwritev_part",
    "bdrv_co_truncate",
    "bdrv_co_unref",
    "bdrv_block_status_above",
    "bdrv_check_qiov_request",
    "bdrv_default_perms",
    "bdrv_get_aio_context",
    "bdrv_get_device_name",
    "bdrv_get_device_or_node_name",
    "bdrv_get_node_name",
    "bdrv_getlength",
    "bdrv_graph_co_rdlock",
    "bdrv_graph_generation",
    "bdrv_graph_co_rdunlock",
    "bdrv_graph_wrlock",
    "bdrv_graph_wrunlock",
    "bdrv_has_zero_init",
    "bdrv_is_read_only",
    "bdrv_is_writable",
    "bdrv_open_file_child",
    "bdrv_opt_mem_align",
    "bdrv_register",
    "bdrv_uses_whitelist",
    "bdrv_unref_child",
    "blk_bs",
    "blk_new_with_bs",
    "blk_truncate",
    "blk_unref",
    "blk_co_flush",
    "blk_co_getlength",
    "blk_co_new_open",
    "blk_co_new_with_bs",
    "blk_co_pread",
    "blk_co_pwrite",
    "blk_co_truncate",
    "blk_co_unref",
    "blk_set_allow_write_beyond_eof",
    // Dirty bitmaps.
    "bdrv_create_dirty_bitmap",
    "bdrv_dirty_bitmap_check",
    "bdrv_dirty_bitmap_deserialize_finish",
    "bdrv_dirty_bitmap_deserialize_ones",
    "bdrv_dirty_bitmap_deserialize_part",
    "bdrv_dirty_bitmap_enabled",
    "bdrv_dirty_bitmap_first",
    "bdrv_dirty_bitmap_get_persistence",
    "bdrv_dirty_bitmap_granularity",
    "bdrv_dirty_bitmap_inconsistent",
    "bdrv_dirty_bitmap_name",
    "bdrv_dirty_bitmap_next",
    "bdrv_dirty_bitmap_next_dirty",
    "bdrv_dirty_bitmap_readonly",
    "bdrv_dirty_bitmap_serialization_size",
    "bdrv_dirty_bitmap_serialize_part",
    "bdrv_dirty_bitmap_set_inconsistent",
    "bdrv_dirty_bitmap_set_persistence",
    "bdrv_dirty_bitmap_set_readonly",
    "bdrv_dirty_bitmap_size",
    "bdrv_disable_dirty_bitmap",
    "bdrv_find_dirty_bitmap",
    "bdrv_release_dirty_bitmap",
    "bdrv_supports_persistent_dirty_bitmap",
    // Encryption.
    "block_crypto_amend_opts_init",
    "block_crypto_create_opts_init",
    "block_crypto_open_opts_init",
    "qapi_free_QCryptoBlockAmendOptions",
    "qapi_free_QCryptoBlockCreateOptions",
    "qcrypto_block_amend_options",
    "qapi_free_QCryptoBlockInfo",
    "qapi_free_QCryptoBlockOpenOptions",
    "qcrypto_block_calculate_payload_offset",
    "qcrypto_block_create",
    "qcrypto_block_decrypt",
    "qcrypto_block_encrypt",
    "qcrypto_block_free",
    "qcrypto_block_get_info",
    "qcrypto_block_open",
    "qemu_opts_to_qdict",
    // Coroutines, memory, vectors.
    "aio_co_wake",
    "qemu_co_mutex_lock",
    "thread_pool_submit_co",
    "qemu_co_mutex_unlock",
    "qemu_coroutine_create",
    "qemu_coroutine_enter",
    "qemu_coroutine_self",
    "qemu_coroutine_yield",
    "qemu_in_coroutine",
    "qemu_iovec_add",
    "qemu_iovec_concat",
    "qemu_iovec_destroy",
    "qemu_iovec_from_buf",
    "qemu_iovec_init",
    "qemu_iovec_memset",
    "qemu_iovec_to_buf",
    "qemu_try_blockalign0",
    "qemu_vfree",
    "g_free",
    "g_malloc0",
    "g_strdup",
    // Options and errors.
    "error_free",
    "error_get_pretty",
    "error_propagate",
    "qapi_enum_lookup",
    "qapi_enum_parse",
    "qapi_event_send_block_image_corrupted",
    "qapi_free_BlockdevCreateOptions",
    "qdict_clone_shallow",
    "qdict_del",
    "qdict_extract_subqdict",
    "qdict_get_try_str",
    "qdict_haskey",
    "qdict_join",
    "qdict_new",
    "qdict_put_str",
    "qdict_rename_keys",
    "qdict_size",
    "qemu_opt_find",
    "qemu_opt_get",
    "qemu_opt_get_bool",
    "qemu_opt_get_bool_del",
    "qemu_opt_get_del",
    "qemu_opt_get_number",
    "qemu_opt_get_number_del",
    "qemu_opt_get_size",
    "qemu_opt_get_size_del",
    "qemu_opts_absorb_qdict",
    "qemu_opts_create",
    "qemu_opts_del",
    "qemu_opts_to_qdict_filtered",
    "qobject_input_visitor_new_flat_confused",
    "visit_free",
    "visit_type_BlockdevCreateOptions",
];

const TYPES: &[&str] = &[
    "BdrvChildRoleBits",
    "BitmapCheckFlags",
    "BlockDriver",
    "BlockdevCreateOptions",
    "QCryptoBlockFormat",
    "QCryptoBlockOpenFlags",
    "QDictRenames",
];

const VARIABLES: &[&str] = &[
    "rq_.*",
    "BDRV_BLOCK_.*",
    "BDRV_O_.*",
    "BDRV_SECTOR_SIZE",
    "BLK_PERM_.*",
    "BlockdevDriver_lookup",
    "PreallocMode_lookup",
    "bdrv_qcow2",
    "child_of_bds",
    "error_abort",
];

/// Types whose layout the C compiler has to confirm: all that are read or
/// filled in through the bindings, not only passed on.
const CHECKED: &[&str] = &[
    "BDRVReopenState",
    "BdrvCheckResult",
    "BdrvChild",
    "BlockDriver",
    "BlockDriverInfo",
    "BlockDriverState",
    "BlockLimits",
    "BlockMeasureInfo",
    "BlockStatsSpecific",
    "BlockStatsSpecificRqcow2",
    "BlockdevAmendOptions",
    "BlockdevAmendOptionsQcow2",
    "BlockdevCreateOptions",
    "BlockdevCreateOptionsQcow2",
    "CoMutex",
    "ImageInfoSpecific",
    "ImageInfoSpecificQCow2",
    "ImageInfoSpecificQCow2Encryption",
    "ImageInfoSpecificQCow2Wrapper",
    "ImageInfoSpecificRqcow2",
    "ImageInfoSpecificRqcow2Chain",
    "QCryptoBlockAmendOptions",
    "QCryptoBlockCreateOptions",
    "QCryptoBlockInfo",
    "QDictRenames",
    "QEMUIOVector",
    "QEMUSnapshotInfo",
    "Qcow2BitmapInfo",
    "Qcow2BitmapInfoFlagsList",
    "Qcow2BitmapInfoList",
    "uint64List",
];

fn main() {
    for name in ["SRC", "BUILD", "CFLAGS", "CC", "CC_FLAGS"] {
        println!("cargo::rerun-if-env-changed=RQCOW2_QEMU_{name}");
    }
    for path in ["build.rs", "src/shim.c", "src/shim.h"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let source = PathBuf::from(setting("RQCOW2_QEMU_SRC"));
    let build = PathBuf::from(setting("RQCOW2_QEMU_BUILD"));
    let flags = words(&setting("RQCOW2_QEMU_CFLAGS"));
    watch(&source, &build);

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let bindings = generate(&flags);
    assert!(
        bindings.contains("image_format_name"),
        "{} lacks the patches in patches/10.0",
        source.display()
    );
    fs::write(out.join("bindings.rs"), &bindings).expect("OUT_DIR is writable");
    fs::write(out.join("layout.h"), layout_checks(&bindings)).expect("OUT_DIR is writable");
    compile(&out, flags);
}

/// An environment variable that has to be set.
fn setting(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| {
        eprintln!(
            "error: {name} is not set.\n\
             qemu-glue is compiled against the headers of a QEMU tree. It is built by QEMU's own \
             build (run `make build`), which sets RQCOW2_QEMU_SRC, RQCOW2_QEMU_BUILD and \
             RQCOW2_QEMU_CFLAGS."
        );
        std::process::exit(1);
    })
}

fn words(line: &str) -> Vec<String> {
    shlex::split(line).unwrap_or_else(|| panic!("unbalanced quotes: {line}"))
}

/// Runs again when a header changes that the bindings depend on.
fn watch(source: &Path, build: &Path) {
    let headers = [
        "include/block/aio.h",
        "include/block/block-common.h",
        "include/block/block-global-state.h",
        "include/block/block-io.h",
        "include/block/block_int-common.h",
        "include/block/block_int-global-state.h",
        "include/block/block_int-io.h",
        "include/block/dirty-bitmap.h",
        "include/block/graph-lock.h",
        "include/qemu/coroutine.h",
        "include/qemu/iov.h",
        "include/qemu/option.h",
        "include/system/block-backend-io.h",
        "block/coroutines.h",
        "block/crypto.h",
        "include/block/thread-pool.h",
        "include/crypto/block.h",
    ];
    let generated = [
        "config-host.h",
        "qapi/qapi-types-block-core.h",
        "trace/trace-block.h",
    ];
    for path in headers
        .iter()
        .map(|name| source.join(name))
        .chain(generated.iter().map(|name| build.join(name)))
    {
        println!("cargo::rerun-if-changed={}", path.display());
    }
}

fn generate(flags: &[String]) -> String {
    let mut builder = bindgen::Builder::default()
        .header("src/shim.h")
        .clang_args(flags)
        // GCC's atomics are macros over types that clang does not know.
        .clang_arg("-Wno-everything")
        .use_core()
        .derive_debug(false)
        .derive_default(true)
        .generate_comments(false)
        .prepend_enum_name(false)
        .layout_tests(true)
        // Aligned more strictly than the number in it on machines of 32 bits.
        .opaque_type("Stat64")
        .allowlist_type("Stat64")
        .formatter(bindgen::Formatter::None);
    for name in FUNCTIONS {
        builder = builder.allowlist_function(name);
    }
    for name in TYPES.iter().chain(CHECKED) {
        builder = builder.allowlist_type(name);
    }
    for name in VARIABLES {
        builder = builder.allowlist_var(name);
    }
    let bindings = builder
        .generate()
        .unwrap_or_else(|e| panic!("bindgen: {e}"));
    // One item a line, so that the layout can be read back from it.
    bindings
        .to_string()
        .replace(" [\"", "\n[\"")
        .replace(" pub ", "\npub ")
}

/// A C header that fails to compile unless the C compiler lays out the types
/// as the bindings have them.
fn layout_checks(bindings: &str) -> String {
    let mut header = String::from("/* Made by build.rs. */\n");
    let mut sizes = 0;
    for line in bindings.lines() {
        let Some((what, rest)) = line
            .strip_prefix("[\"")
            .and_then(|rest| rest.split_once("\"]"))
        else {
            continue;
        };
        let Some(value) = rest
            .rsplit_once(" - ")
            .and_then(|(_, value)| value.split("usize").next())
            .and_then(|value| value.trim().parse::<usize>().ok())
        else {
            continue;
        };
        let expression = if let Some(name) = what.strip_prefix("Size of ") {
            if !CHECKED.contains(&name) {
                continue;
            }
            sizes += 1;
            format!("sizeof({name})")
        } else if let Some((name, field)) = what
            .strip_prefix("Offset of field: ")
            .and_then(|path| path.split_once("::"))
        {
            // Names that bindgen made up are not known to C.
            if !CHECKED.contains(&name) || field.starts_with("__bindgen") || field == "type_" {
                continue;
            }
            format!("offsetof({name}, {field})")
        } else {
            continue;
        };
        writeln!(
            header,
            "_Static_assert({expression} == {value}, \"{what} differs between C and Rust\");"
        )
        .expect("writing to a string");
    }
    assert_eq!(
        sizes,
        CHECKED.len(),
        "bindgen has not told the size of all types in CHECKED"
    );
    header
}

fn compile(out: &Path, flags: Vec<String>) {
    let mut build = cc::Build::new();
    if let Ok(compiler) = env::var("RQCOW2_QEMU_CC") {
        build.compiler(compiler);
    }
    // Without them the default flags of cc are close enough.
    let flags = match env::var("RQCOW2_QEMU_CC_FLAGS") {
        Ok(all) => {
            build.no_default_flags(true).warnings(false);
            words(&all)
        }
        Err(_) => flags,
    };
    for flag in flags {
        build.flag(flag);
    }
    build.include(out).file("src/shim.c").compile("qemu-shim");
}
