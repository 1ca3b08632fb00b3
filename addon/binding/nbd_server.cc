// SPDX-License-Identifier: Apache-2.0
#include "nbd_server.h"

#include <system_error>

#include "../nbd/listener.h"
#include "error.h"
#include "registry.h"
#include "sim.h"

namespace tcmu {

namespace {

const Export server(&NbdServer::init);

uint64_t integer(const Napi::Object& object, const char* key) {
  return static_cast<uint64_t>(object.Get(key).As<Napi::Number>().Int64Value());
}

std::string text(const Napi::Object& object, const char* key) {
  return object.Get(key).As<Napi::String>().Utf8Value();
}

}  // namespace

void NbdServer::init(Napi::Env env, Napi::Object exports) {
  exports.Set("NbdServer", DefineClass(env, "NbdServer",
                                       {
                                           InstanceMethod<&NbdServer::described>("described"),
                                           InstanceMethod<&NbdServer::close>("close"),
                                           InstanceMethod<&NbdServer::counts>("counts"),
                                       }));
}

// new NbdServer(simDevice, options)
NbdServer::NbdServer(const Napi::CallbackInfo& info)
    : ObjectWrap(info), Member(Environment::of(info.Env())) {
  const Napi::Env env = info.Env();
  const auto deviceObject = info[0].As<Napi::Object>();
  const auto options = info[1].As<Napi::Object>();
  SimDevice* device = SimDevice::Unwrap(deviceObject);
  nbd::Config config{
      .name = text(options, "name"),
      .description = text(options, "description"),
      .tls = static_cast<nbd::TlsPolicy>(integer(options, "tls")),
      .maxConnections = static_cast<uint32_t>(integer(options, "maxConnections")),
  };
  callback_ = Napi::Persistent(options.Get("event").As<Napi::Function>());
  const int error = async_.open(environment_, this, [](uv_loop_t* loop, uv_async_t* handle) {
    return uv_async_init(loop, handle,
                         [](uv_async_t* h) { static_cast<NbdServer*>(h->data)->deliver(); });
  });
  if (error != 0) throw systemError(env, -error, "uv_async_init");
  awake_ = true;
  try {
    UniqueFd listener;
    if (options.Get("path").IsString()) {
      listener = nbd::listenAt(text(options, "path"));
    } else {
      auto port = static_cast<uint16_t>(integer(options, "port"));
      listener = nbd::listenOn(text(options, "host"), port);
      Value().Set("port", Napi::Number::New(env, port));
    }
    server_ = std::make_shared<nbd::Server>(device->shared(env), std::move(config),
                                            std::move(listener),
                                            static_cast<nbd::Observer&>(*this));
  } catch (const std::system_error& failed) {
    throw systemError(env, failed.code().value(), failed.what());
  }
  device->keep(server_);
  device_ = Napi::Persistent(deviceObject);
  open_ = true;
  Ref();
}

NbdServer::~NbdServer() { NbdServer::stop(); }

void NbdServer::happened(Event event) {
  std::lock_guard guard(lock_);
  if (!awake_) return;
  events_.push_back(std::move(event));
  uv_async_send(async_.get());
}

void NbdServer::stop() {
  {
    std::lock_guard guard(lock_);
    awake_ = false;
  }
  if (server_) server_->abandon();
  async_.close();
}

void NbdServer::deliver() {
  const Napi::Env env = Env();
  const Napi::HandleScope scope(env);
  std::vector<Event> events;
  {
    std::lock_guard guard(lock_);
    events.swap(events_);
  }
  for (Event& event : events) {
    if (environment_.stopping()) return;
    const bool closed = event.kind == Event::Kind::closed;
    if (closed && !std::exchange(open_, false)) continue;
    napi_value arguments[] = {
        Napi::Number::New(env, static_cast<int>(event.kind)),
        Napi::Number::New(env, static_cast<double>(event.connection)),
        Napi::Number::New(env, event.socket.release()),
        Napi::Number::New(env, event.plain.release()),
    };
    environment_.call(callback_, std::size(arguments), arguments);
    if (closed) {
      stop();
      device_.Reset();
      Unref();
      return;
    }
  }
}

// described(connection, disk?)
Napi::Value NbdServer::described(const Napi::CallbackInfo& info) {
  std::optional<nbd::Disk> disk;
  if (info[1].IsObject()) {
    const auto facts = info[1].As<Napi::Object>();
    disk = nbd::Disk{
        .size = integer(facts, "size"),
        .blockSize = static_cast<uint32_t>(integer(facts, "blockSize")),
        .preferredSize = static_cast<uint32_t>(integer(facts, "preferredSize")),
        .flags = static_cast<uint16_t>(integer(facts, "flags")),
        .pieceBytes = static_cast<uint32_t>(integer(facts, "pieceBytes")),
        .fuaInWrite = facts.Get("fuaInWrite").ToBoolean(),
        .tellsStatus = facts.Get("tellsStatus").ToBoolean(),
        .unmapsToZero = facts.Get("unmapsToZero").ToBoolean(),
        .unmapBlocks = integer(facts, "unmapBlocks"),
        .writeSameBlocks = integer(facts, "writeSameBlocks"),
    };
  }
  server_->described(static_cast<uint64_t>(info[0].As<Napi::Number>().Int64Value()), disk);
  return info.Env().Undefined();
}

// close(atOnce)
Napi::Value NbdServer::close(const Napi::CallbackInfo& info) {
  if (info[0].ToBoolean())
    server_->drop();
  else
    server_->close();
  return info.Env().Undefined();
}

Napi::Value NbdServer::counts(const Napi::CallbackInfo& info) {
  const nbd::Server::Counts counts = server_->counts();
  auto result = Napi::Object::New(info.Env());
  result.Set("connections", Napi::Number::New(info.Env(), static_cast<double>(counts.connections)));
  result.Set("accepted", Napi::Number::New(info.Env(), static_cast<double>(counts.accepted)));
  result.Set("commands", Napi::Number::New(info.Env(), static_cast<double>(counts.commands)));
  return result;
}

}  // namespace tcmu
