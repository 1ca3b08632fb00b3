// SPDX-License-Identifier: Apache-2.0
#include "sim.h"

#include <cstring>
#include <stdexcept>
#include <system_error>

#include "error.h"
#include "method.h"
#include "registry.h"

namespace tcmu {

namespace {

const Export simulator(&SimDevice::init);

double number(const Napi::Object& options, const char* key) {
  return options.Get(key).As<Napi::Number>().DoubleValue();
}

std::span<uint8_t> bytes(const Napi::Value& value) {
  if (value.IsUndefined()) return {};
  auto array = value.As<Napi::Uint8Array>();
  return {array.Data(), array.ByteLength()};
}

sim::Attributes attributes(const Napi::Object& options) {
  return {
      .commandTimeout = sim::Milliseconds(static_cast<int64_t>(number(options, "commandTimeout"))),
      .queueFullTimeout =
          sim::Milliseconds(static_cast<int64_t>(number(options, "queueFullTimeout"))),
      .tmrNotification = options.Get("tmrNotification").ToBoolean(),
      .scrub = options.Get("scrub").ToBoolean(),
      .zeroCopyBytes = static_cast<uint32_t>(number(options, "zeroCopyBytes")),
  };
}

// The core's exceptions as lib/native.ts promises errors.
template <class F>
auto guarded(Napi::Env env, F f) {
  try {
    return f();
  } catch (const std::system_error& error) {
    throw systemError(env, error.code().value(), error.what());
  } catch (const std::invalid_argument& error) {
    throw Napi::RangeError::New(env, error.what());
  }
}

}  // namespace

void SimDevice::init(Napi::Env env, Napi::Object exports) {
  exports.Set("SimDevice",
              DefineClass(env, "SimDevice",
                          {
                              method<&SimDevice::submit>("submit"),
                              InstanceMethod<&SimDevice::open>("open"),
                              InstanceMethod<&SimDevice::taskManagement>("taskManagement"),
                              InstanceMethod<&SimDevice::expire>("expire"),
                              InstanceMethod<&SimDevice::setBlocked>("setBlocked"),
                              InstanceMethod<&SimDevice::resetRing>("resetRing"),
                              InstanceMethod<&SimDevice::freeKeptBuffer>("freeKeptBuffer"),
                              InstanceMethod<&SimDevice::reclaim>("reclaim"),
                              InstanceMethod<&SimDevice::setAttributes>("setAttributes"),
                              InstanceMethod<&SimDevice::setFaults>("setFaults"),
                              InstanceMethod<&SimDevice::kick>("kick"),
                              InstanceMethod<&SimDevice::refuseAll>("refuseAll"),
                              InstanceMethod<&SimDevice::unregister>("unregister"),
                              InstanceMethod<&SimDevice::peek>("peek"),
                              InstanceMethod<&SimDevice::poke>("poke"),
                              InstanceMethod<&SimDevice::entries>("entries"),
                              InstanceMethod<&SimDevice::state>("state"),
                              InstanceMethod<&SimDevice::startLoad>("startLoad"),
                              InstanceMethod<&SimDevice::stopLoad>("stopLoad"),
                              InstanceMethod<&SimDevice::close>("close"),
                          }));
}

SimDevice::SimDevice(const Napi::CallbackInfo& info)
    : ObjectWrap(info), Member(Environment::of(info.Env())) {
  const Napi::Env env = info.Env();
  const auto options = info[0].As<Napi::Object>();
  const sim::Geometry geometry{
      .ringBytes = static_cast<size_t>(number(options, "ringBytes")),
      .dataBytes = static_cast<size_t>(number(options, "dataBytes")),
      .pagesPerBlock = static_cast<uint32_t>(number(options, "pagesPerBlock")),
      .capabilities = static_cast<uint16_t>(number(options, "capabilities")),
      .zeroCopy = options.Get("zeroCopy").ToBoolean(),
      .windowBytes = static_cast<size_t>(number(options, "windowBytes")),
      .poison = static_cast<int>(number(options, "poison")),
  };
  callback_ = Napi::Persistent(options.Get("finished").As<Napi::Function>());

  auto results = Napi::Uint32Array::New(env, kBatch * kResultWords);
  auto sense = Napi::Uint8Array::New(env, kBatch * sim::entry::kSenseBytes);
  results_ = results.Data();
  sense_ = sense.Data();
  results_table_ = Napi::Persistent(results);
  sense_table_ = Napi::Persistent(sense);
  Value().Set("results", results);
  Value().Set("sense", sense);

  guarded(env, [&] { device_ = std::make_shared<sim::Device>(geometry, attributes(options)); });
  Value().Set("mapSize", Napi::Number::New(env, static_cast<double>(device_->mapSize())));
  const int error = async_.open(environment_, this, [](uv_loop_t* loop, uv_async_t* handle) {
    return uv_async_init(loop, handle,
                         [](uv_async_t* h) { static_cast<SimDevice*>(h->data)->deliver(true); });
  });
  if (error != 0) throw systemError(env, -error, "uv_async_init");
  uv_unref(reinterpret_cast<uv_handle_t*>(async_.get()));
  awake_ = true;
}

SimDevice::~SimDevice() { SimDevice::stop(); }

void SimDevice::finished(const sim::Completion& completion) {
  std::lock_guard guard(lock_);
  finished_.push_back(completion);
}

void SimDevice::batchEnd() {
  std::lock_guard guard(lock_);
  wake();
}

void SimDevice::wake() {
  if (awake_) uv_async_send(async_.get());
}

void SimDevice::stop() {
  {
    std::lock_guard guard(lock_);
    awake_ = false;
  }
  if (load_) load_->stop();
  for (const auto& server : servers_) server->abandon();
  if (device_) device_->stop();
  servers_.clear();
  async_.close();
}

// While something is pending the event loop lives.
void SimDevice::hold() {
  if (pending_++ == 0) uv_ref(reinterpret_cast<uv_handle_t*>(async_.get()));
}

void SimDevice::release(uint32_t count) {
  pending_ -= count;
  if (pending_ == 0 && async_) uv_unref(reinterpret_cast<uv_handle_t*>(async_.get()));
}

void SimDevice::enter(const Napi::FunctionReference& function, napi_value argument, bool fromLoop) {
  if (fromLoop)
    environment_.call(function, 1, &argument);
  else
    function.Call({argument});
}

void SimDevice::deliver(bool fromLoop) {
  const Napi::Env env = Env();
  const Napi::HandleScope scope(env);
  std::vector<sim::Completion> batch;
  bool load_ended;
  {
    std::lock_guard guard(lock_);
    batch.swap(finished_);
    load_ended = std::exchange(load_ended_, false);
  }
  for (size_t done = 0; done < batch.size() && !environment_.stopping();) {
    const auto count = static_cast<uint32_t>(std::min<size_t>(kBatch, batch.size() - done));
    for (uint32_t i = 0; i < count; i++, done++) {
      const sim::Completion& completion = batch[done];
      uint32_t* words = results_ + i * kResultWords;
      words[0] = static_cast<uint32_t>(completion.tag);
      words[1] = completion.status | (completion.hasSense ? 0x100u : 0u);
      words[2] = completion.dataBytes;
      words[3] = completion.residual;
      giveBack(words[0]);
      if (completion.hasSense)
        std::memcpy(sense_ + i * completion.sense.size(), completion.sense.data(),
                    completion.sense.size());
    }
    release(count);
    enter(callback_, toNumber(env, count), fromLoop);
  }
  if (load_ended && !environment_.stopping()) deliverLoad(fromLoop);
}

void SimDevice::deliverLoad(bool fromLoop) {
  const Napi::Env env = Env();
  const Napi::FunctionReference callback = std::move(load_callback_);
  const sim::LoadReport& report = load_->report();
  auto result = Napi::Object::New(env);
  const auto set = [&](const char* key, double value) {
    result.Set(key, Napi::Number::New(env, value));
  };
  set("commands", static_cast<double>(report.commands));
  set("reads", static_cast<double>(report.reads));
  set("failed", static_cast<double>(report.failed));
  set("corrupt", static_cast<double>(report.corrupt));
  set("seconds", report.seconds);
  set("firstFailedStatus", report.failed ? report.firstFailure.status : 0);
  set("meanLatency", report.latency.mean() / 1e9);
  set("maxLatency", static_cast<double>(report.latency.max()) / 1e9);
  const auto shares = {0.5, 0.9, 0.99, 0.999};
  auto latency = Napi::Array::New(env, shares.size());
  uint32_t i = 0;
  for (const double share : shares)
    latency.Set(
        i++, Napi::Number::New(env, static_cast<double>(report.latency.percentile(share)) / 1e9));
  result.Set("latency", latency);
  if (report.failed && report.firstFailure.hasSense) {
    const auto& sense = report.firstFailure.sense;
    auto copy = Napi::Uint8Array::New(env, sense.size());
    std::copy(sense.begin(), sense.end(), copy.Data());
    result.Set("firstSense", copy);
  }
  release(1);
  load_.reset();  // before lib/ can close the device, whose memory it uses
  enter(callback, result, fromLoop);
}

sim::Device& SimDevice::device(Napi::Env env) const {
  if (!device_) throw codedError(env, "ENODEV", "ENODEV: the simulated device was closed");
  return *device_;
}

std::shared_ptr<sim::Device> SimDevice::shared(Napi::Env env) const {
  device(env);
  return device_;
}

void SimDevice::keep(std::shared_ptr<nbd::Server> server) {
  // One that ended: only ours is left.
  std::erase_if(servers_, [](const auto& each) { return each.use_count() == 1 && each->idle(); });
  servers_.push_back(std::move(server));
}

// submit(tag, cdb, dataOut?, dataIn?, bidirectional as 0 or 1)
napi_value SimDevice::submit(const Arguments<5>& arguments) {
  sim::Device& target = device(arguments.env);
  const auto optional = [&](size_t i) -> std::span<uint8_t> {
    napi_valuetype type;
    napi_typeof(arguments.env, arguments.values[i], &type);
    if (type == napi_undefined) return {};
    const Bytes bytes = arguments.bytes(i);
    return {bytes.data, bytes.length};
  };
  const Bytes cdb = arguments.bytes(1);
  sim::Request request{
      .tag = arguments.uint32(0),
      .initiator = this,
      .cdb = {cdb.data, cdb.length},
      .dataOut = optional(2),
      .dataIn = optional(3),
      .bidirectional = arguments.uint32(4) != 0,
  };
  if (target.pool()) {
    const Lent lent{lend(request.dataOut.size()), lend(request.dataIn.size()),
                    request.dataIn.data()};
    if (!lent.out.empty()) {
      std::memcpy(lent.out.data(), request.dataOut.data(), lent.out.size());
      request.dataOut = lent.out;
    }
    if (!lent.in.empty()) {
      std::memset(lent.in.data(), 0, lent.in.size());
      request.dataIn = lent.in;
    }
    lent_.emplace(static_cast<uint32_t>(request.tag), lent);
  }
  hold();
  target.submit({&request, 1});
  return nullptr;
}

// Memory of the pool, for what could go without copying; nothing when there is none.
std::span<uint8_t> SimDevice::lend(size_t bytes) {
  if (bytes == 0 || bytes % sim::kPage) return {};
  return device_->pool()->allocate(bytes);
}

void SimDevice::giveBack(uint32_t tag) {
  const auto it = lent_.find(tag);
  if (it == lent_.end()) return;
  const Lent lent = it->second;
  lent_.erase(it);
  if (!lent.in.empty()) std::memcpy(lent.target, lent.in.data(), lent.in.size());
  device_->pool()->free(lent.out);
  device_->pool()->free(lent.in);
}

Napi::Value SimDevice::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const sim::Uio::Handle handle = guarded(env, [&] { return device(env).open(); });
  auto result = Napi::Object::New(env);
  result.Set("memoryFd", Napi::Number::New(env, handle.memory));
  result.Set("eventFd", Napi::Number::New(env, handle.event));
  result.Set("doorbellFd", Napi::Number::New(env, handle.doorbell));
  return result;
}

// taskManagement(type, tag?): on one command, or on all. Returns how many it affects.
Napi::Value SimDevice::taskManagement(const Napi::CallbackInfo& info) {
  const auto type = static_cast<sim::Tmr>(info[0].As<Napi::Number>().Uint32Value());
  const bool all = info[1].IsUndefined();
  const uint64_t tag = all ? 0 : info[1].As<Napi::Number>().Uint32Value();
  size_t count = 0;
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint) {
    const auto affects = [&](const sim::Command& command) {
      return all || (command.tag == tag && command.initiator == this);
    };
    count = kernel.taskManagement(type, affects);
  });
  return Napi::Number::New(info.Env(), static_cast<double>(count));
}

Napi::Value SimDevice::expire(const Napi::CallbackInfo& info) {
  bool found = false;
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint) {
    found = kernel.expireNow(this, info[0].As<Napi::Number>().Uint32Value());
  });
  return Napi::Boolean::New(info.Env(), found);
}

Napi::Value SimDevice::setBlocked(const Napi::CallbackInfo& info) {
  const bool blocked = info[0].ToBoolean();
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint now) {
    if (blocked)
      kernel.block(now);
    else
      kernel.unblock();
  });
  return info.Env().Undefined();
}

Napi::Value SimDevice::resetRing(const Napi::CallbackInfo& info) {
  const int level = info[0].As<Napi::Number>();
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint now) {
    kernel.resetRing(level, now);
  });
  return info.Env().Undefined();
}

Napi::Value SimDevice::freeKeptBuffer(const Napi::CallbackInfo& info) {
  bool found = false;
  const auto id = static_cast<uint16_t>(info[0].As<Napi::Number>().Uint32Value());
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint now) {
    found = kernel.freeKeptBuffer(id, now);
  });
  return Napi::Boolean::New(info.Env(), found);
}

Napi::Value SimDevice::reclaim(const Napi::CallbackInfo& info) {
  size_t freed = 0;
  guarded(info.Env(), [&] {
    device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint now) {
      freed = kernel.reclaim(now);
    });
  });
  return Napi::Number::New(info.Env(), static_cast<double>(freed));
}

Napi::Value SimDevice::setAttributes(const Napi::CallbackInfo& info) {
  const sim::Attributes changed = attributes(info[0].As<Napi::Object>());
  bool taken = false;
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint) {
    taken = kernel.setAttributes(changed);
  });
  if (!taken) throw systemError(info.Env(), EINVAL, "write");
  return info.Env().Undefined();
}

Napi::Value SimDevice::setFaults(const Napi::CallbackInfo& info) {
  const auto options = info[0].As<Napi::Object>();
  device(info.Env())
      .setFaults({
          .seed = static_cast<uint64_t>(number(options, "seed")),
          .holdCommand = number(options, "holdCommand"),
          .lateWakeup = number(options, "lateWakeup"),
          .lostWakeup = number(options, "lostWakeup"),
          .spuriousWakeup = number(options, "spuriousWakeup"),
          .maxDelay = sim::Milliseconds(static_cast<int64_t>(number(options, "maxDelay"))),
      });
  return info.Env().Undefined();
}

Napi::Value SimDevice::kick(const Napi::CallbackInfo& info) {
  device(info.Env()).kick();
  return info.Env().Undefined();
}

Napi::Value SimDevice::refuseAll(const Napi::CallbackInfo& info) {
  device(info.Env()).act([](sim::Kernel& kernel, sim::TimePoint) { kernel.refuseAll(); });
  return info.Env().Undefined();
}

Napi::Value SimDevice::unregister(const Napi::CallbackInfo& info) {
  device(info.Env()).unregister();
  return info.Env().Undefined();
}

// peek(offset, length): a copy of the mapping's bytes.
Napi::Value SimDevice::peek(const Napi::CallbackInfo& info) {
  const auto offset = static_cast<uint64_t>(info[0].As<Napi::Number>().Int64Value());
  const auto length = static_cast<uint64_t>(info[1].As<Napi::Number>().Int64Value());
  bool present = false;
  auto copy = Napi::Uint8Array::New(info.Env(), length);
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint) {
    const size_t end = kernel.memory().present();
    present = offset <= end && length <= end - offset;
    if (present) std::memcpy(copy.Data(), kernel.memory().at(offset), length);
  });
  if (!present) throw Napi::RangeError::New(info.Env(), "no memory there");
  return copy;
}

// poke(offset, bytes)
Napi::Value SimDevice::poke(const Napi::CallbackInfo& info) {
  const auto offset = static_cast<uint64_t>(info[0].As<Napi::Number>().Int64Value());
  const std::span<uint8_t> source = bytes(info[1]);
  bool present = false;
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint) {
    const size_t end = kernel.memory().present();
    present = offset <= end && source.size() <= end - offset;
    if (present) std::memcpy(kernel.memory().at(offset), source.data(), source.size());
  });
  if (!present) throw Napi::RangeError::New(info.Env(), "no memory there");
  return info.Env().Undefined();
}

// entries(): the ring's bytes from where the kernel has taken completions to the head.
Napi::Value SimDevice::entries(const Napi::CallbackInfo& info) {
  std::vector<uint8_t> copy;
  uint32_t from = 0;
  device(info.Env()).act([&](sim::Kernel& kernel, sim::TimePoint) {
    from = kernel.cleaned();
    const uint8_t* ring = kernel.memory().at(sim::mailbox::kBytes);
    if (kernel.head() >= from) {
      copy.assign(ring + from, ring + kernel.head());
    } else {
      copy.assign(ring + from, ring + kernel.ringSize());
      copy.insert(copy.end(), ring, ring + kernel.head());
    }
  });
  auto result = Napi::Object::New(info.Env());
  result.Set("from", Napi::Number::New(info.Env(), from));
  auto array = Napi::Uint8Array::New(info.Env(), copy.size());
  if (!copy.empty()) std::memcpy(array.Data(), copy.data(), copy.size());
  result.Set("bytes", array);
  return result;
}

Napi::Value SimDevice::state(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  auto result = Napi::Object::New(env);
  const auto set = [&](const char* key, uint64_t value) {
    result.Set(key, Napi::Number::New(env, static_cast<double>(value)));
  };
  sim::DeviceStats device_stats;
  const char* broken = nullptr;
  device(env).act([&](sim::Kernel& kernel, sim::TimePoint) {
    const sim::KernelStats& stats = kernel.stats();
    set("commands", stats.commands);
    set("completions", stats.completions);
    set("pads", stats.pads);
    set("taskManagements", stats.tmrs);
    set("waited", stats.waited);
    set("expired", stats.expired);
    set("unknownOps", stats.unknownOps);
    set("resets", stats.resets);
    set("zeroCopied", stats.exposed);
    set("copied", stats.copied);
    set("scrubbedBytes", stats.scrubbed);
    set("zaps", kernel.zaps());
    set("inFlight", kernel.inFlight());
    set("waiting", kernel.waiting());
    set("idsInUse", kernel.idsInUse());
    set("blocksInUse", kernel.blocksInUse());
    set("head", kernel.head());
    set("tail", kernel.cleaned());
    set("ringSize", kernel.ringSize());
    set("dataOffset", kernel.dataOffset());
    set("memoryBytes", kernel.memory().present());
    result.Set("blocked", Napi::Boolean::New(env, kernel.blocked()));
    broken = kernel.broken();
  });
  device_stats = device(env).stats();
  set("wakeups", device_stats.wakeups);
  set("doorbells", device_stats.doorbells);
  result.Set("broken", broken ? Napi::String::New(env, broken) : env.Null());
  return result;
}

// startLoad(options, ended)
Napi::Value SimDevice::startLoad(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  sim::Device& target = device(env);
  if (load_) throw codedError(env, "EBUSY", "EBUSY: a load is running");
  const auto options = info[0].As<Napi::Object>();
  const double duration = number(options, "duration");
  sim::LoadOptions load{
      .depth = static_cast<uint32_t>(number(options, "depth")),
      .bytes = static_cast<uint32_t>(number(options, "bytes")),
      .blockSize = static_cast<uint32_t>(number(options, "blockSize")),
      .firstBlock = static_cast<uint64_t>(number(options, "firstBlock")),
      .blocks = static_cast<uint64_t>(number(options, "blocks")),
      .readShare = number(options, "readShare"),
      .sequential = options.Get("sequential").ToBoolean(),
      .verify = options.Get("verify").ToBoolean(),
      .count = static_cast<uint64_t>(number(options, "count")),
      .seed = static_cast<uint64_t>(number(options, "seed")),
  };
  if (duration > 0) load.duration = sim::Milliseconds(static_cast<int64_t>(duration));
  guarded(env, [&] {
    load_ = std::make_unique<sim::LoadGenerator>(target, load, [this] {
      std::lock_guard guard(lock_);
      load_ended_ = true;
      wake();
    });
  });
  load_callback_ = Napi::Persistent(info[1].As<Napi::Function>());
  hold();
  load_->start();
  return env.Undefined();
}

Napi::Value SimDevice::stopLoad(const Napi::CallbackInfo& info) {
  if (load_) load_->stop();
  return info.Env().Undefined();
}

Napi::Value SimDevice::close(const Napi::CallbackInfo& info) {
  if (device_) {
    stop();
    deliver(false);
    load_.reset();
    device_.reset();
  }
  return info.Env().Undefined();
}

}  // namespace tcmu
